"""The durable books: what every request used and cost, and who may ask. SQLite or PostgreSQL."""

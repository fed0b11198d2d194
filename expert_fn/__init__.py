"""The expert function: some layers' experts behind one compute endpoint, started in a blink."""

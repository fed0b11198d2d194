"""The front door: OpenAI's API, planning, streaming and metering; no tensor library."""

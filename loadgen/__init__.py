"""Replay real traffic against an OpenAI-compatible server: the readers of public traces."""

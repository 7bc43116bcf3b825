"""People and programs talk to a program here: Python, a terminal chat, an OpenAI server."""

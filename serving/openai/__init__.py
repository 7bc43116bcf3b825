"""OpenAI's HTTP interface: what requests may say, and what answers look like."""

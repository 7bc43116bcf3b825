"""A Qwen3.5 MoE that is large enough to judge a quantizer, trained and measured in one command."""

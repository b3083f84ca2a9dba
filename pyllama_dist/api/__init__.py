"""An OpenAI-compatible server: HTTP on one side, an engine on the other."""

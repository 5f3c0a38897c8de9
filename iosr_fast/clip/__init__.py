"""CLIP in torch: loading, adapter, dual encoder, prompts. architecture, demo, load and models import without torch."""

"""CLIP in torch: loading, adapter, dual encoder, prompts. `architecture`, `demo`, `load`, `models` import without torch."""

"""CLIP in torch: loading, adapter, dual encoder, prompts. No torch: `architecture`, `demo`, `load`, `models`."""

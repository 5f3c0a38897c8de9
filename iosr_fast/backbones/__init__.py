"""Models in torch: loading, adapter, dual encoder, prompts. No torch: `demo`, `load`, `models`."""

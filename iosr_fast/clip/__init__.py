"""CLIP in torch: loading, adapter, dual encoder, prompts. `architecture`, `demo` and `load` import without torch."""

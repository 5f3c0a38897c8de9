"""CLIP in torch: loading, the adapter, the dual encoder that both are fused into, and prompts."""

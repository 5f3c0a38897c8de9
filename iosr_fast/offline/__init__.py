"""Everything that happens before deployment: needs torch and open_clip, which the runtime never imports."""

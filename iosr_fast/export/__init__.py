"""CLIP and adapter to an engine folder, with torch and open_clip; engines to other engines without (`convert`)."""

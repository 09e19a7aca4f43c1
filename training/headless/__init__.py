"""Training without ComfyUI: the same objectives over diffusers U-Nets, shards of data and many processes."""

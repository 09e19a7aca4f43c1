"""With nodes/, the only room that knows ComfyUI."""

"""The miniature world that ships with the pack: pictures, captions, a judge and a tiny diffusion model."""

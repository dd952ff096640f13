"""Features that images are compared by: pixels, CLIP, SSCD, latents and others."""

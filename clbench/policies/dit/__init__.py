"""What the two flow-matching diffusion-transformer policies share: configuration, tokens, blocks, text, processors."""

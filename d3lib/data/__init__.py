"""Where samples come from: every source gives the same sample, a dictionary of

- `rgb`: uint8 (3, H, W), sRGB;
- `depth`: float32 (1, H, W), metres, the training target (0 where invalid);
- `valid`: bool (1, H, W), True where `depth` is a measurement;
- `exact`: float32 (1, H, W), metres, the true depth everywhere; only synthetic sources have it.
"""

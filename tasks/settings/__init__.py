"""Every setting, typed and validated once; presets."""

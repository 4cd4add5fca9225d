"""Run the commands from `index` to `eval` on drawn pictures."""

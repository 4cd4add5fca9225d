"""Public weights as parameters under big_vision's names.

`resolve` finds the files of a name and `registry` lists known names. `npz`, `timm`, `huggingface` and `text_towers`
each read one layout of files; `from_torch` and `to_torch` translate torch's names and shapes.
"""

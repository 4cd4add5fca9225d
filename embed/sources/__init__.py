"""The source formats that `lit-fast index` reads.

`interface` describes a reader, `formats` is the table of all formats, and each format has a module of its own.
"""

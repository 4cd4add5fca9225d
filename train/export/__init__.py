"""`lit-fast export`: write a trained model in the formats of other libraries.

Each format is one module with the functions of `lit_fast.train.export.writer.ExportFormat`.
"""

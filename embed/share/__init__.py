"""Share a dataset through the Hugging Face Hub: index, captions, tokens and features, without the images.

contents   the files of a dataset in a repository; paths of this machine are replaced
manifest   lit_fast.json: the files with sizes and digests
card       README.md of the repository
push, pull the commands
"""

from __future__ import annotations

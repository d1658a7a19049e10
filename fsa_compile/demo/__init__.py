"""``python -m fsa_compile.demo``: trains a small byte-level language model with NSA attention and shows what happened.

``model`` is also the place to see how an NSA layer is written with this package; nothing in it is special to the demo.
"""

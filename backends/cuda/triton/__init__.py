"""Triton kernels of the ops that `et_moe.backends.ops` defines, one folder an op.

`<op>/op.py` has the function with the op's parameters; it launches kernels of `decode.py` for one
or a few tokens and of `prefill.py` for many, where these differ. `<op>/layout.py` brings weights
into the order that the kernels read, ahead of time. `common/` is what several ops share, `tuning/`
the tuned configurations, `table.py` the list of ops that have kernels.

`<op>/cases.py` and `cases/` serve tools and tests; a compiled program does not depend on them.
"""

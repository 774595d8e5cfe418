"""Pictures, page and plain words made from a finished report: pure, dicts in, bytes or text out.

`words` needs the standard library only, so that the gate and the terminal can use it;
`figures` imports matplotlib and `html` imports jinja2 inside their functions.
"""

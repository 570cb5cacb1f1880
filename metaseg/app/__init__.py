"""The page in the browser, `python -m metaseg.app`.

`session.py` is what it does, `page.py` what it shows, `guard.py` what may be asked of it.
"""

"""Evaluation of caches: functions of (model, make_cache, tokens), and reports.

Everything here reads the quantized cache: text is fed in chunks after an exact prefill.
"""

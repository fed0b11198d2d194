"""MoEless on the platform: loads foretold in flight decide where experts are computed.

Nothing here is on a token's way: predicting and acting have threads of their own.
"""

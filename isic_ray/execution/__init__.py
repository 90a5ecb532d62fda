"""How Ray does it: session, actor pool, training workers, tuning, streams, progress. The only
importer of ray and deepspeed.
"""

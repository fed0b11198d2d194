"""The planner: predicts from a prompt which experts it will use, and plans for that.

`python -m planner` serves it over HTTP; as a library, `planner.planning.Planner` is the whole of
it and imports neither a web framework nor a tensor library.
"""

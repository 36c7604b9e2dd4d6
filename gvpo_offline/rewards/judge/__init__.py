"""Language models as judges: requests to a server, stored answers, and scorers that read them.

    groups -> rubric -> requests -> server -> journal -> committed answers -> scorer

The requests are a stage of their own, before the reward stage. They cost money, so every answer is
stored and no request that was answered is sent again.
"""

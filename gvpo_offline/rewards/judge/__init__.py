"""Language models as judges: questions, answers that are kept, and numbers made of them.

    groups -> rubric -> questions -> server -> journal -> committed answers -> scorer

Asking is a stage of its own, before the reward stage: it costs money, and is never done twice.
"""

"""The pure steps: what one update, one evaluation and one prediction compute, traced and never compiled here.

It also refuses what a user's methods return wrongly. It owns no loop, no data and no layout on devices.
"""

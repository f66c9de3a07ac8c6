"""The surface that users see: `Trainer`, what a subclass may define, the checks of its arguments, and the wiring.

It owns no step and no order of events.
"""

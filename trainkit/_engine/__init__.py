"""The compiled steps of one trainer, made at first use and kept; the settings of the CPU that they run under.

It does not own the order in which steps run.
"""

"""The way of a batch from the host into a step: padded, masked, placed, or picked from data that lie on the device.

It does not own the order of the data, which is the source's, nor when a batch is due, which is the loop's.
"""

"""The accelerator of a rank: every question that is put to it by the name of its kind, or of its vendor.

The launcher asks for names alone and is not to wait for torch. Therefore this file imports nothing.
"""

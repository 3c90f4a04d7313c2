"""Profiles of hardware, and everything done to a device: identities, signatures, flashing."""

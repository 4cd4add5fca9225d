"""Helpers that know neither datasets nor models."""

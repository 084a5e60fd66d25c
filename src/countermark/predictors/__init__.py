"""Suspects that can only be queried: functions from images to classes, live or behind a service."""

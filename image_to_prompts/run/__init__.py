"""What every stage stands on: folders, files, locks, progress, devices."""

"""The commands of localization heads; the code is in vicrop/localization."""

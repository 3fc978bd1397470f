"""Define what every room uses. This room knows neither models nor images."""

"""The ground floor: what every room uses. It knows neither models nor images."""

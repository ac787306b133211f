"""AWS on one machine: moto's services and radqueue's own HealthImaging behind one endpoint."""

//! Replace a running network server by its next version without losing a connection.

idf_component_register(SRCS main.c REQUIRES acclimate PRIV_REQUIRES driver esp_system)

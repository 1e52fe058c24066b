"""Reports, drawings and profiles of programs and studies."""

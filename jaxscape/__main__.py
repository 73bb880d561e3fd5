from jaxscape.cli import main

main()

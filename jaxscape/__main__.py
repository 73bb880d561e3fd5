from jaxscape.cli.main import main

main()
